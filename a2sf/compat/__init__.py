"""What this package uses of other libraries beyond their documented interfaces: one module for each library.

Each names the version that it was tried with; pyproject.toml bounds the library from above.
"""

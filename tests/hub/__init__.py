"""A Hugging Face hub on 127.0.0.1 for tests: a store of repositories, a server with faults by rule, small things to put in.

`tests/conftest.py` has the fixtures; `python -m tests.hub STORE` serves a store by hand.
"""

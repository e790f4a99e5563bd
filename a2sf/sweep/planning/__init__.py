"""What a sweep will take, and how far it is."""

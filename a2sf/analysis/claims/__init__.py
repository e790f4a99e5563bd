"""Published claims and what our measurements say of them."""

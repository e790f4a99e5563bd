"""Settings found on plain text: which rule, numbers and slots each layer and head needs, and which heads copy."""

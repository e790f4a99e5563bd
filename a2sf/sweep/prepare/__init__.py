"""Before cells are computed: models and documents are identified, checked and downloaded."""

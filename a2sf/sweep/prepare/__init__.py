"""What must be on this machine before cells are computed: models, documents."""

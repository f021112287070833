"""What composes with any method by ``+``: one file per addon."""

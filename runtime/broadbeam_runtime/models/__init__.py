"""Model families, each a list of decoder layers built straight from its checkpoint."""

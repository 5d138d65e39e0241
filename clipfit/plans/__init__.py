"""A plan carried out: what is compared, on which images, cell by cell, and the tables of it."""

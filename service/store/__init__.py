"""The review database: what models said of photos, and what people decided about them. SQL is here and nowhere else."""

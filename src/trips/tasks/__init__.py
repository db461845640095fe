"""Task models: each file holds the model class, its inference and its data contract."""

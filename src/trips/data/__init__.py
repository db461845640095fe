"""Reading of image-text data: typed samples, readers of annotation formats, datasets and collators."""

"""Native MTP checkpoints in and out: families of layouts, import, export, validation and serving."""

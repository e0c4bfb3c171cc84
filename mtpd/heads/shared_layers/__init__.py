"""Layer sharing: heads of any kind that read the last layers of the trunk with adapters of their own."""

"""Data: sources, readers, preparation, prepared folders, splits and loaders."""

"""Data and small trained models that come with the package, so that every command can be tried offline."""

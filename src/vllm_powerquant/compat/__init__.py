"""Other packages' names for this package's parts, so that code written for them runs by changing an import."""

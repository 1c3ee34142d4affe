"""Settings: strict models, presets, and how a command line becomes a config."""

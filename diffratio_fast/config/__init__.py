"""Options of the commands that train, their presets and their checks."""

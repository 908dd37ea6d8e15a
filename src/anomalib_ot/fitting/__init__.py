"""From a folder of good images to a checked model with a promised rate of false alarms."""

"""Pictures and captions: found, checked, encoded once and kept."""

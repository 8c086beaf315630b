"""Captions written by the base's own Qwen2.5-VL."""

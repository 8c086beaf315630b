"""A miniature world of cartoon creatures: its painter, its small pretrained models, its pictures."""

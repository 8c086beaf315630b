"""A folder of pictures, looked at before training: what each is like, and whether it should be trained on."""

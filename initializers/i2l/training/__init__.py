"""Train an i2L expert: its data, its network, pictures to learn from, and what it costs at full size."""

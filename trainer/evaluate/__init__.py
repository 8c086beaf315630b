"""LoRAs against held-out pictures: numbers, a page, and pairs for people to choose from."""

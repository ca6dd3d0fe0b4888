"""The finished adapter as files, with a card, and on the hub."""

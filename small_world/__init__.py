"""The world of the laptop default: clips with an oracle, and the training of its teacher."""

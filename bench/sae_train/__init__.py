"""The speed of SAE training beside the floor of its dense product and beside the field's trainers."""

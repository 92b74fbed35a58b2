"""What is measured of each kind of model, a file each, and what all of them share."""

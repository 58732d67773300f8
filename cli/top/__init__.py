"""The live view of the fleet on a terminal."""

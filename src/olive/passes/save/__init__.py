"""Passes that give a quantised model the form of other tools."""

"""A kind of experiment that raymi does not have: heads whose output is scaled."""

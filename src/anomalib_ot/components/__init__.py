"""Parts shared by the models. Import them from their modules: the command line needs one that does without torch."""

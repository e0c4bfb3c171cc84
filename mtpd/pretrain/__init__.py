"""Models trained from scratch with heads beside them: `mtpd pretrain`."""

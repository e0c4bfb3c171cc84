"""`mtpd export`: heads in the forms that serving engines load."""

"""Everything that a GPU can show, in one command, part by part in processes of their own."""

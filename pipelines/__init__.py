"""From recipe to finished chain: parsing, keys, launching, plan and status."""

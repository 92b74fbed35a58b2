"""Floor 6: several stations in a row: one recipe from donor to card, many plans in one table, and which plan to choose."""

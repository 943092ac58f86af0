"""Sparse feedback (Bansal, Dang and Grover, ICLR 2024): protocols, files, agreement, sheets, endpoint."""

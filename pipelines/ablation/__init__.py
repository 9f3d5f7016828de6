"""The grid runner behind `layered ablate`: experiments, their cells, what they cost, what came of them."""

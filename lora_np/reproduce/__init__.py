"""The paper's claims, checked: what each says, the figure that is found here, and whether it holds."""

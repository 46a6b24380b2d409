"""Where the truth is kept: one small contract, kept alike by several stores."""

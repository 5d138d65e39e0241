"""The library's verbs: one public function each.

In a package of their own, so that `clipfit.adapt` is the function and never a module of the same name.
"""

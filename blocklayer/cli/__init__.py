"""Layer ``cli``: argument trees and text over the public API. One file a command: ``add`` its arguments, ``run`` it."""

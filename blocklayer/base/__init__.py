"""Layer ``base``: the words every other layer speaks. No I/O, no asyncio, no imports from above.

errors   the one exception tree          units    sizes as people write them
ranges   alignment and interval maths    extents  block status of a range
limits   what a driver can take          buffers  zero tests and reusable memory
modes    enumerations shared by layers   options  "driver=qcow2,file.filename=..." and json: names
"""

"""Layer ``codec/nbd``: the NBD protocol as bytes and values, for both of its sides. No I/O; source: NBD's doc/proto.md.

protocol          numbers, flags and limits      errors_map        errors on the wire and here
options           messages of the handshake      transmission      headers of requests and replies
server_handshake  a server's turns               payloads          errors, holes and block status
server_options    what it answers                uri               nbd:// names
client_handshake  a client's turns
client_replies    what it is answered
"""

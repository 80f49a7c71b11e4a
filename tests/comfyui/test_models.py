import real

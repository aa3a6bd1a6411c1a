"""Where siglip_fast plugs into other projects, a module for each; none is imported unless asked for."""

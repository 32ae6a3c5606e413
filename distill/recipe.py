class UserError(ValueError): pass

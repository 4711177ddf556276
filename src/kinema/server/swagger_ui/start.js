// Shows the server's own description. Every address is relative to the page, so a proxy may put a prefix before it.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  layout: "BaseLayout",
  deepLinking: true,
  validatorUrl: null, // by default the description is sent to validator.swagger.io
});

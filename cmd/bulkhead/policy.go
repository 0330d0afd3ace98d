// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

func (c *cli) policyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "policy",
		Aliases: []string{"policies"},
		Short:   "Look at egress policies in force; check, test and import policy files",
		Long: `Look at egress policies in force; check, test and import policy files.

status and suggest ask the node. check, test and import work on files alone: they need no
node and no rights.`,
		Example: `  bulkhead policy status web
  bulkhead policy suggest web > draft.yaml
  bulkhead policy check acme.yaml acme-vision.yaml
  bulkhead policy test --tenant acme/vision /etc/bulkhead/tenants cases.yaml`,
		Args: known,
		RunE: help,
	}
	cmd.AddCommand(c.policyStatusCmd(), c.policySuggestCmd(), c.policyCheckCmd(), c.policyTestCmd(), c.policyImportCmd())
	return cmd
}

func (c *cli) policyStatusCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "status SANDBOX...",
		Short: "Report the policy in force: what each rule let through, limits, names, drops",
		Long: `Report the policy in force for a sandbox: whether the kernel enforces it, what each rule
has let through and when it was last used, rules that were never used, how full rates and
budgets are, which names it has resolved, what was dropped and why, and what audit mode
has let pass.`,
		Example: `  bulkhead policy status web
  bulkhead policy status web -o json | jq '.rules[] | select(.packets == "0") | .rule'`,
		Args:              args(1, -1, "SANDBOX..."),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			printed := 0
			return c.each(cmd, refs, func(node nodev1.NodeClient, ref string) error {
				resp, err := node.PolicyStatus(cmd.Context(), &nodev1.PolicyStatusRequest{Ref: ref})
				if err != nil {
					return err
				}
				printed++
				switch {
				case c.json():
					return render.JSON(c.stdout, resp)
				case c.quiet:
					_, err := fmt.Fprintln(c.stdout, resp.GetSandbox())
					return err
				case printed > 1:
					if _, err := fmt.Fprintln(c.stdout); err != nil {
						return err
					}
				}
				return render.PolicyStatus(c.stdout, resp)
			})
		},
	}
}

func (c *cli) policySuggestCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "suggest SANDBOX",
		Short: "Write a policy that allows what audit mode has let pass",
		Long: `Write a policy that allows what audit mode has let pass in a sandbox, as YAML. It is a
draft: read it before it is put in force, for it allows whatever the sandbox did while
somebody watched. Run the sandbox under a policy with mode: audit first.`,
		Example: `  bulkhead policy suggest web > draft.yaml
  bulkhead policy check draft.yaml`,
		Args:              args(1, 1, "SANDBOX"),
		ValidArgsFunction: c.completeSandboxes,
		RunE: func(cmd *cobra.Command, refs []string) error {
			node, err := c.node()
			if err != nil {
				return err
			}
			resp, err := node.PolicySuggest(cmd.Context(), &nodev1.PolicySuggestRequest{Ref: refs[0]})
			switch {
			case err != nil:
				return err
			case c.json():
				return render.JSON(c.stdout, resp)
			case resp.GetPolicy() == "":
				return fmt.Errorf("nothing was let pass for audit in %s so far: is its policy in mode audit? (bulkhead policy status %s)", refs[0], refs[0])
			}
			_, err = io.WriteString(c.stdout, render.Lines(resp.GetPolicy()))
			return err
		},
	}
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	"github.com/bulkheadhq/bulkhead/netpol/openshell"
)

func (c *cli) policyImportCmd() *cobra.Command {
	var from string
	var strict bool
	var opts openshell.Options
	cmd := &cobra.Command{
		Use:   "import --from openshell FILE",
		Short: "Turn another system's policy into one of ours",
		Long: `Turn another system's policy into one of ours: what has a meaning here goes to standard
output, and what had to be left out, or could not be taken as it was, is listed with its
line on standard error. Only the network part is taken. FILE is - for standard input.`,
		Example: `  bulkhead policy import --from openshell sandbox-policy.yaml > policy.yaml
  bulkhead policy import --from openshell --strict sandbox-policy.yaml`,
		Args:              args(1, 1, "--from openshell FILE"),
		ValidArgsFunction: completeFiles,
		RunE: func(cmd *cobra.Command, files []string) error {
			switch from {
			case "":
				return usagef("--from is missing; there is openshell")
			case "openshell":
			default:
				return usagef("--from: %q is not known%s; there is openshell", from, nearest(from, []string{"openshell"}))
			}
			data, err := c.readFile(files[0])
			if err != nil {
				return err
			}
			policy, notes, err := opts.Import(nameOf(files[0]), data)
			if err != nil {
				return c.faults(cmd, err)
			}
			return c.printImport(cmd, nameOf(files[0]), policy, notes, strict)
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "whose form the file has: openshell")
	cmd.Flags().BoolVar(&strict, "strict", false, "fail, and write no policy, if anything had to be left out")
	cmd.Flags().BoolVar(&opts.IgnoreBinaries, "ignore-binaries", false,
		"import what is allowed to certain programs only: every process may go there then")
	cmd.Flags().BoolVar(&opts.IgnoreAllowedIPs, "ignore-allowed-ips", false,
		"import names that may resolve into certain networks only: they may resolve to anything then, private too")
	return cmd
}

func (c *cli) printImport(cmd *cobra.Command, file string, policy []byte, notes []openshell.Note, strict bool) error {
	if c.json() {
		list := []map[string]any{}
		for _, n := range notes {
			list = append(list, map[string]any{"line": n.Line, "path": n.Path, "why": n.Why})
		}
		text := string(policy)
		if strict && len(notes) > 0 {
			text = ""
		}
		if err := render.JSONFields(c.stdout, render.Field{Name: "policy", Value: text}, render.Field{Name: "left_out", Value: list}); err != nil {
			return err
		}
	} else {
		for _, n := range notes {
			c.sayf(cmd, "%s", render.Clean(fmt.Sprintf("%s:%d: %s: %s", file, n.Line, n.Path, n.Why)))
		}
	}
	if strict && len(notes) > 0 {
		return fmt.Errorf("%d parts of %s have no meaning here, and --strict is given", len(notes), file)
	}
	if c.json() {
		return nil
	}
	_, err := c.stdout.Write(policy)
	return err
}

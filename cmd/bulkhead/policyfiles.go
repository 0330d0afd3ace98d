// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/policytest"
	"github.com/bulkheadhq/bulkhead/tenant"
)

const chainHelp = `FILEs are the policies of a chain, ancestors first. A FILE may also be a directory of
tenants as the agent reads it; --tenant then says whose chain is meant, and a file after it
is the own policy of a sandbox of that tenant.`

func (c *cli) policyCheckCmd() *cobra.Command {
	var of string
	cmd := &cobra.Command{
		Use:   "check [flags] FILE...",
		Short: "Check policy files and say what they allow together",
		Long:  "Check policy files and say what they allow together, without a node.\n\n" + chainHelp,
		Example: `  bulkhead policy check acme.yaml acme-vision.yaml
  bulkhead policy check --tenant acme/vision /etc/bulkhead/tenants
  bulkhead policy check --tenant acme/vision /etc/bulkhead/tenants web.yaml`,
		Args:              args(1, -1, "[flags] FILE..."),
		ValidArgsFunction: completeFiles,
		RunE: func(cmd *cobra.Command, files []string) error {
			prog, err := c.chain(of, files)
			if err != nil {
				return c.faults(cmd, err)
			}
			switch {
			case c.json():
				return render.JSONFields(c.stdout, programFields(prog)...)
			case c.quiet:
				return nil
			}
			_, err = io.WriteString(c.stdout, render.Lines(prog.Describe()))
			return err
		},
	}
	addTenantFlag(cmd, &of)
	return cmd
}

// faults tells of every fault in files, each on a line of its own.
func (c *cli) faults(cmd *cobra.Command, err error) error {
	var usage *usageError
	if err == nil || errors.As(err, &usage) {
		return err
	}
	lines := strings.Split(err.Error(), "\n")
	for _, l := range lines[:len(lines)-1] {
		c.sayf(cmd, "%s", render.Clean(l))
	}
	return errors.New(lines[len(lines)-1])
}

func addTenantFlag(cmd *cobra.Command, of *string) {
	cmd.Flags().StringVar(of, "tenant", "", "whose chain of a directory of tenants, as in acme/vision")
}

func programFields(p netpol.Program) []render.Field {
	rules := []map[string]any{}
	for _, r := range p.Rules {
		rules = append(rules, map[string]any{"tenant": r.Tenant, "rule": r.Name, "action": r.Action.String(), "rate_bits": r.Rate})
	}
	return []render.Field{
		{Name: "digest", Value: hex.EncodeToString(p.Digest[:])},
		{Name: "mode", Value: p.Mode.String()},
		{Name: "rules", Value: rules},
		{Name: "prefixes", Value: len(p.Entries)},
		{Name: "names", Value: len(p.Names)},
		{Name: "description", Value: p.Describe()},
	}
}

// completeFiles leaves the completion of names of files to the shell.
func completeFiles(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// chain compiles what files and --tenant name.
func (c *cli) chain(of string, files []string) (netpol.Program, error) {
	if fi, err := os.Stat(files[0]); err == nil && fi.IsDir() {
		return c.tenantChain(of, files[0], files[1:])
	}
	if of != "" {
		return netpol.Program{}, usagef("--tenant is for a directory of tenants; %s is none", files[0])
	}
	layers, err := c.layers(files)
	if err != nil {
		return netpol.Program{}, err
	}
	return netpol.Compile(layers)
}

// tenantChain is what the agent compiles for a sandbox of a tenant, with or
// without a policy of its own.
func (c *cli) tenantChain(of, dir string, files []string) (netpol.Program, error) {
	if of == "" {
		return netpol.Program{}, usagef("%s is a directory of tenants; say whose policy is meant with --tenant", dir)
	}
	path, err := tenant.ParsePath(of)
	if err != nil {
		return netpol.Program{}, usagef("--tenant: %v", err)
	}
	if len(files) > 1 {
		return netpol.Program{}, usagef("%q is one too many: a sandbox has one policy of its own", files[1])
	}
	set, err := tenant.Load(dir)
	if err != nil {
		return netpol.Program{}, err
	}
	own, err := c.layers(files)
	if err != nil {
		return netpol.Program{}, err
	}
	if len(own) == 0 {
		return set.Compile(path, nil)
	}
	return set.Compile(path, &own[0].Policy)
}

// layers reads policies, each the layer of a tenant with the policy's name.
func (c *cli) layers(files []string) ([]netpol.Layer, error) {
	var out []netpol.Layer
	var errs []error
	for _, file := range files {
		data, err := c.readFile(file)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		p, err := netpol.Parse(nameOf(file), data)
		if err != nil {
			errs = append(errs, err)
		}
		out = append(out, netpol.Layer{Tenant: p.Name, File: nameOf(file), Policy: p})
	}
	return out, errors.Join(errs...)
}

// readFile reads a file named in an argument; "-" is standard input.
func (c *cli) readFile(name string) ([]byte, error) {
	f, err := c.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, netpol.MaxPolicyBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", nameOf(name), err)
	}
	return data, nil
}

func (c *cli) policyTestCmd() *cobra.Command {
	var of string
	cmd := &cobra.Command{
		Use:   "test [flags] FILE... CASES",
		Short: "Test policy files against cases, without a node",
		Long: `Test policy files against cases, without a node. It exits with 1 if a case fails.

` + chainHelp + `

CASES is a YAML file with kind: PolicyTest and a list of cases:

  - {name: models, to: "api.example.com:443", expect: allow, rule: model-api}
  - {name: no ssh, to: "203.0.113.9:22", expect: deny}
  - {name: dns, to: "203.0.113.53:53", proto: udp, expect: deny}
  - {name: ping, to: echo 203.0.113.9, expect: audit}

A name may say what it resolves to, as in resolves: [203.0.113.9]. Addresses of the node
itself, rates and budgets are not tested: those are known to a node alone.`,
		Example: `  bulkhead policy test acme.yaml acme-vision.yaml cases.yaml
  bulkhead policy test --tenant acme/vision /etc/bulkhead/tenants cases.yaml`,
		Args:              args(2, -1, "[flags] FILE... CASES"),
		ValidArgsFunction: completeFiles,
		RunE: func(cmd *cobra.Command, files []string) error {
			last := len(files) - 1
			prog, err := c.chain(of, files[:last])
			if err != nil {
				return c.faults(cmd, err)
			}
			data, err := c.readFile(files[last])
			if err != nil {
				return err
			}
			cases, err := policytest.Load(nameOf(files[last]), data)
			if err != nil {
				return c.faults(cmd, err)
			}
			return c.printResults(nameOf(files[last]), policytest.Run(prog, cases))
		},
	}
	addTenantFlag(cmd, &of)
	return cmd
}

// printResults tells of every case, and with -q of those that fail.
func (c *cli) printResults(file string, results []policytest.Result) error {
	failed := len(policytest.Failed(results))
	for _, r := range results {
		var err error
		switch {
		case c.json():
			err = render.JSONFields(c.stdout, resultFields(r)...)
		case !r.OK:
			_, err = fmt.Fprintf(c.stdout, "FAIL  %s\n", render.Clean(fmt.Sprintf("%s:%d: %s", file, r.Case.Line, r)))
		case !c.quiet:
			_, err = fmt.Fprintf(c.stdout, "ok    %s\n", render.Clean(r.String()))
		}
		if err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d cases failed", failed, len(results))
	}
	return nil
}

func resultFields(r policytest.Result) []render.Field {
	return []render.Field{
		{Name: "case", Value: r.Case.Name}, {Name: "line", Value: r.Case.Line},
		{Name: "to", Value: r.Case.To()}, {Name: "protocol", Value: r.Case.Proto.String()},
		{Name: "expect", Value: r.Case.Expect}, {Name: "got", Value: r.Got}, {Name: "ok", Value: r.OK},
		{Name: "tenant", Value: r.Tenant}, {Name: "rule", Value: r.Rule}, {Name: "reason", Value: r.Reason},
	}
}

// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/price"
	"github.com/bulkheadhq/bulkhead/cmd/bulkhead/render"
	gatewayv1 "github.com/bulkheadhq/bulkhead/proto/gateway/v1"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	"github.com/bulkheadhq/bulkhead/tenant"
)

// usageFlags say what is asked for.
type usageFlags struct {
	tenant, sandbox, meter string
	since, until           string
	bySandbox, records     bool
	prices                 string
	gateway                gatewayFlags
}

func (c *cli) usageCmd() *cobra.Command {
	var u usageFlags
	cmd := &cobra.Command{
		Use:   "usage",
		Short: "Show what tenants have used, and what it costs",
		Long: `Show what tenants have used. A node knows the totals of its own sandboxes; a gateway knows
the ledger of all nodes, for any interval. A record counts for the interval in which it
begins. AMOUNT is for reading, EXACT is what was metered. GAPS counts records that say
that a part is not known.

With --prices costs are computed without rounding and rounded when printed, so a total is
exact and may differ in the last digit from the sum of its rows. See
deploy/examples/prices.toml.`,
		Example: `  bulkhead usage --tenant acme
  bulkhead usage --sandbox web
  bulkhead usage --gateway unix:///run/bulkhead-gateway/gateway.sock --since 2026-11-01 --until 2026-12-01 --prices prices.toml
  bulkhead usage --gateway gw.example.com:7443 --ca ca.pem --records -o json > november.jsonl`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.usage(cmd, u) },
	}
	f := cmd.Flags()
	f.StringVar(&u.tenant, "tenant", "", "this tenant and all below it")
	f.StringVar(&u.sandbox, "sandbox", "", "one sandbox; with --gateway its id")
	f.StringVar(&u.meter, "meter", "", "one meter, as in cpu_ns")
	f.StringVar(&u.since, "since", "", "from this time on: RFC 3339, a date, or a time ago as in 24h (with --gateway)")
	f.StringVar(&u.until, "until", "", "before this time (with --gateway)")
	f.BoolVar(&u.bySandbox, "by-sandbox", false, "a row per sandbox, not per tenant (with --gateway; a node always does)")
	f.BoolVar(&u.records, "records", false, "the single records of the ledger (with --gateway)")
	f.StringVar(&u.prices, "prices", "", "file of prices, TOML or YAML")
	u.gateway.add(f)
	return cmd
}

func (c *cli) usage(cmd *cobra.Command, u usageFlags) error {
	if err := u.gateway.check(); err != nil {
		return err
	}
	var list *price.List
	if u.prices != "" {
		if u.records {
			return usagef("--prices and --records do not go together")
		}
		data, err := os.ReadFile(u.prices)
		if err != nil {
			return usagef("--prices: %v", err)
		}
		if list, err = price.Parse(u.prices, data); err != nil {
			return usagef("--prices: %v", err)
		}
	}
	if u.gateway.addr == "" {
		if u.since != "" || u.until != "" || u.records || u.bySandbox {
			return usagef("--since, --until, --by-sandbox and --records need --gateway: a node knows only totals")
		}
		rows, err := c.nodeUsage(cmd.Context(), u)
		if err != nil {
			return err
		}
		return c.printUsage(cmd, rows, list, u.tenant)
	}
	q, err := u.query(time.Now())
	if err != nil {
		return err
	}
	conn, err := c.dialGateway(u.gateway)
	if err != nil {
		return err
	}
	defer conn.Close()
	gw := gatewayv1.NewGatewayClient(conn)
	if u.records {
		return c.printRecords(cmd.Context(), gw, q)
	}
	resp, err := gw.QueryUsage(cmd.Context(), q)
	if err != nil {
		return err
	}
	var rows []usageRow
	for _, r := range resp.GetRows() {
		rows = append(rows, usageRow{r, r})
	}
	return c.printUsage(cmd, rows, list, u.tenant)
}

func (u usageFlags) query(now time.Time) (*gatewayv1.QueryUsageRequest, error) {
	q := &gatewayv1.QueryUsageRequest{Tenant: u.tenant, Sandbox: u.sandbox, Meter: u.meter, BySandbox: u.bySandbox || u.sandbox != ""}
	for _, b := range []struct {
		flag, value string
		into        *int64
	}{{"--since", u.since, &q.StartNs}, {"--until", u.until, &q.EndNs}} {
		if b.value == "" {
			continue
		}
		t, err := parseMoment(b.value, now)
		if err != nil {
			return nil, usagef("%s: %v", b.flag, err)
		}
		*b.into = t.UnixNano()
	}
	if q.EndNs != 0 && q.EndNs <= q.StartNs {
		return nil, usagef("--until is not after --since")
	}
	return q, nil
}

// usageRow is one row, in the gateway's form and as it came.
type usageRow struct {
	*gatewayv1.UsageRow
	raw proto.Message
}

func (c *cli) nodeUsage(ctx context.Context, u usageFlags) ([]usageRow, error) {
	node, err := c.node()
	if err != nil {
		return nil, err
	}
	resp, err := node.Usage(ctx, &nodev1.UsageRequest{Tenant: u.tenant, Ref: u.sandbox})
	if err != nil {
		return nil, err
	}
	var rows []usageRow
	for _, r := range resp.GetRows() {
		if u.meter != "" && r.GetMeter() != u.meter {
			continue
		}
		rows = append(rows, usageRow{&gatewayv1.UsageRow{Tenant: r.GetTenant(), Sandbox: r.GetSandbox(), SandboxName: r.GetSandboxName(),
			Meter: r.GetMeter(), Total: r.GetTotal(), StartNs: r.GetStartNs(), EndNs: r.GetEndNs()}, r})
	}
	return rows, nil
}

// exact is the row's total, which may be more than 64 bits hold.
func exact(r *gatewayv1.UsageRow) *big.Int {
	if n, ok := new(big.Int).SetString(r.GetTotalDecimal(), 10); ok {
		return n
	}
	return new(big.Int).SetUint64(r.GetTotal())
}

// bill adds up costs without rounding, for each tenant alone and with all
// below it.
type bill struct {
	list     *price.List
	top      tenant.Path // nothing above it is summed; "" for everything
	all      *big.Rat
	tenants  map[tenant.Path]*sums
	unpriced map[string]bool // meters
}

type sums struct{ own, below *big.Rat }

func newBill(list *price.List, top string) *bill {
	return &bill{list: list, top: tenant.Path(top), all: new(big.Rat), tenants: map[tenant.Path]*sums{}, unpriced: map[string]bool{}}
}

func (b *bill) of(path tenant.Path) *sums {
	if b.tenants[path] == nil {
		b.tenants[path] = &sums{new(big.Rat), new(big.Rat)}
	}
	return b.tenants[path]
}

// add answers the cost of one row as printed, "" if its meter has no price.
func (b *bill) add(r *gatewayv1.UsageRow) string {
	path := tenant.Path(r.GetTenant())
	own := b.of(path)
	cost, ok := b.list.Cost(r.GetTenant(), r.GetMeter(), exact(r))
	if !ok {
		b.unpriced[r.GetMeter()] = true
		return ""
	}
	b.all.Add(b.all, cost)
	own.own.Add(own.own, cost)
	own.below.Add(own.below, cost)
	for _, up := range path.Ancestors() {
		if b.top == "" || b.top.Contains(up) {
			s := b.of(up)
			s.below.Add(s.below, cost)
		}
	}
	return b.list.Row(cost)
}

func (c *cli) printUsage(cmd *cobra.Command, rows []usageRow, list *price.List, top string) error {
	slices.SortStableFunc(rows, func(a, b usageRow) int {
		return slices.Compare([]string{a.GetTenant(), a.GetSandbox(), a.GetMeter()}, []string{b.GetTenant(), b.GetSandbox(), b.GetMeter()})
	})
	var b *bill
	header := []string{"TENANT", "SANDBOX", "NAME", "METER", "AMOUNT", "EXACT", "FROM", "UNTIL", "GAPS"}
	if list != nil {
		b = newBill(list, top)
		header = append(header, "COST "+strings.ToUpper(list.Currency))
	}
	var cells [][]string
	for _, r := range rows {
		cost := ""
		if b != nil {
			cost = b.add(r.UsageRow)
		}
		if c.json() {
			var extra []render.Field
			if cost != "" {
				extra = []render.Field{{Name: "cost", Value: cost}, {Name: "currency", Value: list.Currency}}
			}
			if err := render.JSON(c.stdout, r.raw, extra...); err != nil {
				return err
			}
			continue
		}
		gaps := ""
		if r.GetGapRecords() > 0 {
			gaps = fmt.Sprint(r.GetGapRecords())
		}
		row := []string{r.GetTenant(), r.GetSandbox(), r.GetSandboxName(), r.GetMeter(), price.Amount(r.GetMeter(), exact(r.UsageRow)),
			price.Exact(r.GetMeter(), exact(r.UsageRow)), render.Time(r.GetStartNs()), render.Time(r.GetEndNs()), gaps}
		if b != nil {
			row = append(row, cost)
		}
		cells = append(cells, row)
	}
	if !c.json() {
		if err := render.Table(c.stdout, header, cells); err != nil {
			return err
		}
	}
	if b == nil {
		return nil
	}
	if len(b.unpriced) > 0 {
		c.sayf(cmd, "no price for %s", strings.Join(slices.Sorted(maps.Keys(b.unpriced)), ", "))
	}
	return c.printTotals(b)
}

func (c *cli) printTotals(b *bill) error {
	currency := strings.ToUpper(b.list.Currency)
	var cells [][]string
	for _, t := range slices.Sorted(maps.Keys(b.tenants)) {
		own, below := b.list.Total(b.tenants[t].own), b.list.Total(b.tenants[t].below)
		if c.json() {
			if err := render.JSONFields(c.stdout, render.Field{Name: "tenant", Value: t}, render.Field{Name: "own_cost", Value: own},
				render.Field{Name: "subtree_cost", Value: below}, render.Field{Name: "currency", Value: b.list.Currency}); err != nil {
				return err
			}
		}
		cells = append(cells, []string{string(t), own, below})
	}
	if c.json() {
		return nil
	}
	cells = append(cells, []string{"all", "", b.list.Total(b.all)})
	if _, err := io.WriteString(c.stdout, "\n"); err != nil {
		return err
	}
	return render.Table(c.stdout, []string{"TENANT", "OWN " + currency, "WITH ALL BELOW " + currency}, cells)
}

// printRecords streams the ledger; it may be long, so nothing is collected.
func (c *cli) printRecords(ctx context.Context, gw gatewayv1.GatewayClient, q *gatewayv1.QueryUsageRequest) error {
	stream, err := gw.ListRecords(ctx, q)
	if err != nil {
		return err
	}
	if !c.json() {
		if _, err := fmt.Fprintln(c.stdout, strings.Join([]string{"FROM", "UNTIL", "TENANT", "SANDBOX", "METER", "DELTA", "QUALITY", "ID"}, "\t")); err != nil {
			return err
		}
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if c.json() {
			if err := render.JSON(c.stdout, r); err != nil {
				return err
			}
			continue
		}
		quality := strings.ToLower(strings.TrimPrefix(r.GetQuality().String(), "QUALITY_"))
		if _, err := fmt.Fprintf(c.stdout, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\n", time.Unix(0, r.GetStartNs()).UTC().Format(time.RFC3339Nano),
			time.Unix(0, r.GetEndNs()).UTC().Format(time.RFC3339Nano), render.Clean(r.GetTenant()), render.Clean(r.GetSandbox()),
			render.Clean(r.GetMeter()), r.GetDelta(), quality, render.Clean(r.GetId())); err != nil {
			return err
		}
	}
}
